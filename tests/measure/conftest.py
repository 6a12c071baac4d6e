"""What platforms differ in, chosen here."""

import jax
import pytest

from optaxclip._mesh import collectives


@pytest.fixture(params=["cuda", "tpu"])
def accelerator(request, monkeypatch):
    """Takes the branch of `platform_dependent` that is for some accelerator."""
    chosen = []

    def platform_dependent(*args, default, **named):
        chosen.append(named.get(request.param, default))
        return chosen[-1](*args)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    yield chosen
    jax.clear_caches()


@pytest.fixture
def one_device(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(collectives, "is_local", lambda x: True)
    yield
    jax.clear_caches()
