"""Clips between the layers of a Flax model, without touching the model's code."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from optaxclip import _checks, _cotangents, _paths, _values

LayerLimit = _values.Range | Callable[[Any], Any]
_TAP = "_optaxclip_tap"  # attribute of an nnx module


def clip_layer_cotangents(
    fun: Callable[..., Any], limits: Mapping[str, LayerLimit]
) -> Callable[..., Any]:
    r"""Returns ``fun`` with the cotangents of its layers' outputs clipped.

    For a layer :math:`y = f(x)` that a pattern names,

    .. math:: \bar{y} \leftarrow \text{clip}(\bar{y}),

    before the backward pass enters the layer. A layer is a Flax module that is called:
    of linen, anywhere in ``fun``; of nnx, within a model that is an argument of
    ``fun``. The model's code stays as it is, also where it scans, rematerialises or
    maps.

    Wrap the function that you differentiate, and compile last:
    ``jax.jit(jax.grad(clip_layer_cotangents(loss, limits)))``. What is compiled
    already, or is not a Flax module, is not seen; there put :func:`clip_cotangent` into
    the code.

    Graves' rule for an LSTM: the pre-activations of its gates within 10, what comes
    from the outputs within 100. In linen ``nn.LSTMCell`` has a dense layer for every
    gate, ``{"cell/*": 10.0, "head": 100.0}``; in nnx ``nnx.OptimizedLSTMCell`` has two,
    ``{"cell/dense_*": 10.0, "head": 100.0}``. They are summed, so the clip of each is
    that of the sum. (``nn.OptimizedLSTMCell`` of linen has none: its submodules return
    weights. Take :func:`clip_preactivation`.)

    Guarantees: the value of ``fun``; of all derivatives those of
    :func:`clip_cotangent`.

    Args:
      fun: function to be differentiated.
      limits: from path patterns of modules to limits of :func:`clip_cotangent`, or to
        functions that take the layer's output and return it, such as
        ``partial(clip_cotangent_norm, max_norm=1.0, axis=-1)``. A path is that of the
        module among the params, ``encoder/dense_0``; a pattern names the module itself,
        not those in it (``encoder/**`` names all). A layer that no pattern names stays
        free. The carries that a cell returns are clipped too; the steps of ``nn.scan``
        and ``nn.RNN`` are one layer.

    Raises:
      TypeError: ``fun`` is not a function, a pattern is not a string, a limit is
        neither a number, a pair nor a function.
      ValueError: a negative or NaN limit; from the function, if a pattern names no
        layer that was called, or two equally specific ones name the same.

    Examples:
      >>> model = nn.Sequential([nn.Dense(2), jnp.tanh, nn.Dense(1)])
      >>> x = jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)
      >>> def loss(params):
      ...     return jnp.sum(100 * model.apply(params, x))
      >>> clipped = optaxclip.clip_layer_cotangents(loss, {"layers_2": 5.0})
      >>> print(jax.jit(jax.grad(clipped))(params)["params"]["layers_2"]["bias"])
      [5.]

    References:
      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013
    """
    _checks.function(fun, "fun")
    if not isinstance(limits, Mapping):
        raise TypeError(
            "Expected limits to map path patterns of layers to limits, got"
            f" {limits!r}. To clip every layer alike, write {{'**': limit}}."
        )
    _checks.mapping(limits, "limits", _check_limit)
    _paths.check(limits)

    @functools.wraps(fun)
    def clipped(*args: Any, **kwargs: Any) -> Any:
        called: dict[str, str | None] = {}  # paths to patterns

        def tap(path: str, output: Any) -> Any:
            pattern = called[path] = _paths.of_layer(limits, path, "limits")
            return output if pattern is None else _clip(output, limits[pattern])

        with _linen_layers(tap), _nnx_layers((args, kwargs), tap):
            result = fun(*args, **kwargs)
        _check_called(limits, called)
        return result

    return clipped


def _clip(output: Any, limit: Any) -> Any:
    return (
        limit(output) if callable(limit) else _cotangents.clip_cotangent(output, limit)
    )


def _check_limit(limit: Any, what: str) -> None:
    if not callable(limit):
        _values.check_range(limit, what)


def _check_called(limits: Mapping[str, Any], called: Mapping[str, str | None]) -> None:
    if not called:
        raise ValueError(
            "Expected `fun` to call Flax modules, got none. Wrap the function that you"
            " differentiate before it is compiled, `jax.jit(jax.grad(wrapped))`, and"
            " pass an nnx model as an argument. In other models put `clip_cotangent`"
            " into the code."
        )
    for pattern in limits:
        if pattern not in called.values():
            layers = sorted(path or "the model itself" for path in called)
            raise ValueError(
                f"Every pattern of limits has to name a layer that is called:"
                f" {pattern!r} names none. The layers called are {layers}. A pattern"
                " names the layer itself; add '/**' for all in it."
            )


@contextlib.contextmanager
def _linen_layers(tap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Passes what linen modules return through ``tap``."""
    linen: Any = sys.modules.get("flax.linen")

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        return tap("/".join(context.module.path), output)

    with linen.intercept_methods(interceptor) if linen else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _nnx_layers(arguments: Any, tap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Passes what nnx modules return through ``tap``.

    They know no interceptors, so they get another class for a while. The tap goes along
    as an attribute where transformations take a module apart and build it anew.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        yield
        return

    def is_model(x: Any) -> bool:
        return isinstance(x, nnx.Module)

    models = filter(is_model, jax.tree.leaves(arguments, is_leaf=is_model))
    found = {
        id(node): ("/".join(map(str, keys)), node, type(node), getattr(node, _TAP, ()))
        for model in models
        for keys, node in nnx.iter_graph(model)
        if is_model(node) and callable(node)
    }
    try:
        for path, module, cls, taps in found.values():
            object.__setattr__(module, _TAP, (*taps, functools.partial(tap, path)))
            if not taps:
                object.__setattr__(module, "__class__", _tapped_class(cls))
        yield
    finally:
        for _, module, cls, taps in found.values():
            object.__setattr__(module, "__class__", cls)
            object.__setattr__(module, _TAP, taps)
            if not taps:
                object.__delattr__(module, _TAP)


@functools.cache
def _tapped_class(cls: Any) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        for tap in getattr(self, _TAP):
            output = tap(output)
        return output

    return type(cls.__name__, (cls,), {"__call__": __call__})
