"""Runs tests of the installed Optax with our functions in the place of its own.

Run:  python tests/integration/optax_tests.py transforms/_clipping_test.py ...
"""

import pathlib
import sys

import optax
import optax.contrib
import optax.transforms
import pytest

import optaxclip

NAMES = (
    *("clip", "clip_by_block_rms", "clip_by_global_norm", "adaptive_grad_clip"),
    *("normalize_by_update_norm", "global_norm"),
    *("per_example_global_norm_clip", "per_example_layer_norm_clip"),
)
FOLDER = pathlib.Path(optax.__file__).parent


def put_in_place():
    """Puts ours wherever Optax keeps one of its own."""
    ours = {id(getattr(optax, name)): getattr(optaxclip, name) for name in NAMES}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "optax":
            for key, value in list(vars(module).items()):
                if id(value) in ours:
                    setattr(module, key, ours[id(value)])


def main(*arguments):
    """Runs files of Optax's folder; what does not end in ".py" is for pytest.

    With "--own" first, they test Optax's own functions.
    """
    own, *rest = arguments
    if own != "--own":
        put_in_place()
        rest = arguments
    given = [str(FOLDER / x) if x.endswith(".py") else x for x in rest]
    return pytest.main(["-c", "/dev/null", "-p", "no:cacheprovider", "-q", *given])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
