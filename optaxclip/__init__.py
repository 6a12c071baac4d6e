"""Gradient clipping for JAX: Optax transformations that keep training stable."""

from optaxclip import (
    factors as factors,
    norms as norms,
    plot as plot,
    thresholds as thresholds,
)
from optaxclip._advice.diagnose import diagnose as diagnose
from optaxclip._advice.suggest import suggest_max_norm as suggest_max_norm
from optaxclip._checkpoints.carry import carry_over as carry_over
from optaxclip._clips.acclip import AcclipState as AcclipState, acclip as acclip
from optaxclip._clips.by_norm import (
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_group_norm as clip_by_group_norm,
    clip_by_leaf_norm as clip_by_leaf_norm,
    normalize_by_update_norm as normalize_by_update_norm,
)
from optaxclip._clips.by_params import (
    adaptive_grad_clip as adaptive_grad_clip,
    clip_by_relative_step as clip_by_relative_step,
    clip_by_trust_ratio as clip_by_trust_ratio,
)
from optaxclip._clips.by_value import (
    ClipByValueState as ClipByValueState,
    clip as clip,
    clip_by_value as clip_by_value,
)
from optaxclip._clips.clippy import clippy as clippy
from optaxclip._clips.known_norm import clip_with_norm as clip_with_norm
from optaxclip._clips.learnt_global import (
    autoclip as autoclip,
    k_sigma_clip as k_sigma_clip,
    zclip as zclip,
)
from optaxclip._clips.learnt_per_leaf import adagc as adagc, aggc as aggc
from optaxclip._clips.qk_clip import qk_clip as qk_clip
from optaxclip._clips.singular_values import (
    clip_singular_values as clip_singular_values,
)
from optaxclip._clips.spam import SpamState as SpamState, spam_clip as spam_clip
from optaxclip._clips.spectral_norm import (
    SpectralNormState as SpectralNormState,
    clip_by_spectral_norm as clip_by_spectral_norm,
)
from optaxclip._clips.stable_adamw import (
    StableAdamWState as StableAdamWState,
    stable_adamw as stable_adamw,
)
from optaxclip._clips.stable_spam import (
    AdaClipState as AdaClipState,
    stable_spam_clip as stable_spam_clip,
)
from optaxclip._clips.wrappers import (
    ResetState as ResetState,
    UClipState as UClipState,
    reset_momentum as reset_momentum,
    u_clip as u_clip,
)
from optaxclip._cotangents.cotangents import (
    clip_cotangent as clip_cotangent,
    clip_cotangent_norm as clip_cotangent_norm,
    clip_preactivation as clip_preactivation,
)
from optaxclip._cotangents.flax_layers import (
    clip_layer_cotangents as clip_layer_cotangents,
)
from optaxclip._cotangents.stats import (
    CotangentStats as CotangentStats,
    cotangent_stats as cotangent_stats,
)
from optaxclip._engine.clip_by import clip_by as clip_by
from optaxclip._engine.state import ClipState as ClipState
from optaxclip._guards.guards import (
    skip_if_nonfinite as skip_if_nonfinite,
    skip_if_spike as skip_if_spike,
)
from optaxclip._guards.inputs import (
    ZeroNonfiniteState as ZeroNonfiniteState,
    unscale as unscale,
    zero_nonfinite as zero_nonfinite,
)
from optaxclip._guards.running_statistics import keep_if_skipped as keep_if_skipped
from optaxclip._guards.skips import GuardState as GuardState
from optaxclip._looking.history import history as history
from optaxclip._looking.record import RecordState as RecordState, record as record
from optaxclip._looking.summary import summary as summary
from optaxclip._measure.stacks import over_layers as over_layers
from optaxclip._mesh.splits import over_axes as over_axes
from optaxclip._pages.line import status as status
from optaxclip._pages.page import report as report
from optaxclip._pages.terminal import live as live
from optaxclip._per_example.adapt import adapt_max_norm as adapt_max_norm
from optaxclip._per_example.centered import (
    CenteredClip as CenteredClip,
    centered_clip as centered_clip,
)
from optaxclip._per_example.grad import (
    PerExample as PerExample,
    per_example_clipped_grad as per_example_clipped_grad,
)
from optaxclip._per_example.optax_names import (
    per_example_global_norm_clip as per_example_global_norm_clip,
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from optaxclip.norms import global_norm as global_norm

__version__ = "0.2.0"
