"""Clips between the layers of a Flax model, without touching the model's code."""

import contextlib
import contextvars
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from optaxclip._arguments import checks
from optaxclip._clips import by_value
from optaxclip._cotangents import cotangents
from optaxclip._trees import paths as _paths

LayerLimit = by_value.Range | Callable[[Any], Any]
Tap = Callable[[str, Any], Any]  # (path of a layer, its output) -> the output

# Of the functions that are running, the outermost first.
_taps: contextvars.ContextVar[tuple[Tap, ...]] = contextvars.ContextVar("taps")
_calls = itertools.count(1)
# Part of the key of all of JAX's caches of traces: none of them may hold the tap of one
# call for another, or the function without it.
_call: Any = jax.make_user_context(0)


def clip_layer_cotangents(
    fun: Callable[..., Any], limits: Mapping[str, LayerLimit]
) -> Callable[..., Any]:
    r"""Returns ``fun`` with the cotangents of its layers' outputs clipped.

    For a layer :math:`y = f(x)` that a pattern names,

    .. math:: \bar{y} \leftarrow \text{clip}(\bar{y}),

    before the backward pass enters the layer. A layer is a Flax module that is called:
    of linen, anywhere in ``fun``; of nnx, within a model that is an argument of
    ``fun``. The model's code stays as it is, also where it scans, rematerialises, maps
    or compiles: all of it is traced anew at every call. So compile the whole,
    ``jax.jit(jax.grad(clip_layer_cotangents(loss, limits)))``. Modules of other
    libraries are not seen; put :func:`clip_cotangent` into their code.

    While ``fun`` runs, the modules of an nnx model have a subclass of their class.

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
        not those in it (``encoder/**`` names all), and ``/`` the model as a whole. A
        layer that no pattern names stays free. The carries that a cell returns are
        clipped too; the steps of ``nn.scan`` and ``nn.RNN`` are one layer, and so are
        all uses of a shared nnx module, under its first path.

    Raises:
      TypeError: ``fun`` is not a function, a pattern is not a string, a limit is
        neither a number, a pair nor a function.
      ValueError: a negative or NaN limit; from the function, if a pattern names no
        layer that was called, two equally specific ones name the same, or a function
        among the limits changes the structure, a shape or a dtype of an output.

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
    checks.function(fun, "fun")
    if not isinstance(limits, Mapping):
        raise TypeError(
            "Expected limits to map path patterns of layers to limits, got"
            f" {limits!r}. To clip every layer alike, write {{'**': limit}}."
        )
    checks.mapping(limits, "limits", _check_limit)
    _paths.check_layers(limits)

    @functools.wraps(fun)
    def clipped(*args: Any, **kwargs: Any) -> Any:
        called: dict[str, str | None] = {}  # paths to patterns

        def tap(path: str, output: Any) -> Any:
            pattern = called[path] = _paths.of_layer(limits, path, "limits")
            return output if pattern is None else _clip(output, limits[pattern], path)

        with (
            _call(next(_calls)),
            _linen_layers(tap),
            _nnx_layers((fun, args, kwargs), tap),
        ):
            result = fun(*args, **kwargs)
        _check_called(limits, called)
        return result

    return clipped


def _clip(output: Any, limit: Any, path: str) -> Any:
    """Clips the arrays of an output; a string in it, say, stays as it is."""
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, output)
    if callable(limit):
        clipped = limit(arrays)
    else:
        clipped = cotangents.clip_cotangent(arrays, limit)
    came, expected = jax.tree.map(jax.typeof, (clipped, arrays))
    if came != expected:
        raise ValueError(
            f"Expected the function for the layer {(path or '/')!r} to return the"
            f" output that it is given, {expected}, got {came}."
        )
    rest = iter(jax.tree.leaves(clipped))
    return jax.tree.map(lambda x: next(rest) if isinstance(x, jax.Array) else x, output)


def _check_limit(limit: Any, what: str) -> None:
    if not callable(limit):
        try:
            by_value.check_range(limit, what)
        except TypeError as error:
            raise TypeError(
                f"{error} For a norm write"
                " `partial(optaxclip.clip_cotangent_norm, max_norm=1.0)`."
            ) from error


def _check_called(limits: Mapping[str, Any], called: Mapping[str, str | None]) -> None:
    if not called:
        raise ValueError(
            "Expected `fun` to call Flax modules, got none. Pass an nnx model as an"
            " argument. In models of other libraries put `clip_cotangent` into the"
            " code."
        )
    for pattern in limits:
        if pattern not in called.values():
            layers = sorted(path or "/" for path in called)
            raise ValueError(
                f"Every pattern of limits has to name a layer that is called:"
                f" {pattern!r} names none. The layers called are {layers}. A pattern"
                " names a layer, not its parameters; 'a/**' names all layers in a."
            )


@contextlib.contextmanager
def _linen_layers(tap: Tap) -> Iterator[None]:
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
def _nnx_layers(arguments: Any, tap: Tap) -> Iterator[None]:
    """Passes what nnx modules return through ``tap``.

    They know no interceptors, so they get another class for a while, which stays with
    them where transformations take a module apart and build it anew.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        yield
        return

    def is_model(x: Any) -> bool:
        return isinstance(x, nnx.Module)

    running = _taps.get(())
    models = filter(is_model, jax.tree.leaves(arguments, is_leaf=is_model))
    found = {
        id(node): (node, type(node), "/".join(map(str, keys)))
        for model in models
        for keys, node in nnx.iter_graph(model)
        if is_model(node) and callable(node)
    }
    token = _taps.set((*running, tap))
    try:
        for module, cls, path in found.values():
            tapped = _tapped_class(cls, path, len(running))
            object.__setattr__(module, "__class__", tapped)
        yield
    finally:
        _taps.reset(token)
        for module, cls, _ in found.values():
            object.__setattr__(module, "__class__", cls)


@functools.cache
def _tapped_class(cls: Any, path: str, depth: int) -> type:
    """Returns a subclass that passes what is returned through the tap at ``depth``."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        taps = _taps.get(())
        return taps[depth](path, output) if depth < len(taps) else output

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"__call__": __call__} | names)
