"""What a library writes, it reads again, and it is carried over: the docs' table."""

import pathlib
import pickle

import equinox
import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint
import pytest

import helpers
from carry_cases import OPTIMIZERS, guarded_and_recorded
from helpers import oc, thorough

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"
PARAMS = helpers.random_tree(seed=9)


def by_flax(state, template, folder):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(template, data)


def by_orbax(state, template, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


def by_older_orbax(state, template, folder):
    checkpointer = orbax.checkpoint.PyTreeCheckpointer()
    checkpointer.save(folder / "state", state)
    how = orbax.checkpoint.checkpoint_utils.construct_restore_args(template)
    return checkpointer.restore(folder / "state", item=template, restore_args=how)


def by_equinox(state, template, folder):
    equinox.tree_serialise_leaves(folder / "state", state)
    return equinox.tree_deserialise_leaves(folder / "state", template)


def by_pickle(state, template, folder):
    return pickle.loads(pickle.dumps(jax.device_get(state)))


def by_npz(state, template, folder):
    np.savez(folder / "state.npz", *jax.tree.leaves(state))
    likes, treedef = jax.tree.flatten(template)
    with np.load(folder / "state.npz") as arrays:
        pairs = zip(arrays.values(), likes, strict=True)
        return treedef.unflatten([x.view(like.dtype) for x, like in pairs])


LIBRARIES = {
    "Flax": by_flax,
    "Orbax": by_orbax,
    "older Orbax": by_older_orbax,
    "Equinox": by_equinox,
    "pickle": by_pickle,
    "npz": by_npz,
}
SAVED = OPTIMIZERS | {
    "bfloat16 moments": lambda m: optax.chain(
        m.clip_by_global_norm(1.0), optax.adam(0.1, mu_dtype="bfloat16")
    )
}
CHANGES = {
    "to these": lambda make: (make(optax), make(oc)),
    "back": lambda make: (make(oc), make(optax)),
    "guarded and recorded": lambda make: (
        make(optax),
        guarded_and_recorded(make(optax)),
    ),
}


def table():
    """The cells of the page, by row and column."""
    lines = PAGE.read_text(encoding="utf-8").partition("| saved state ")[2]
    rows = [
        line.strip("|").split("|") for line in lines.splitlines() if line[:1] == "|"
    ]
    libraries, _, *rows = [[cell.strip() for cell in row] for row in rows]
    return {
        (row[0], library): cell
        for row in rows
        for library, cell in zip(libraries, row[1:], strict=True)
    }


CELLS = table()
ALL = [(*cell, change) for cell, said in CELLS.items() for change in CHANGES]
FEW = [
    ("partition", library, change)
    for library, change in zip(LIBRARIES, [*CHANGES, *CHANGES], strict=True)
]
REST = [thorough(*case) for case in ALL if case not in FEW and CELLS[case[:2]] == "yes"]


def test_the_table_has_every_state_and_library():
    assert list(CELLS) == [(row, column) for row in SAVED for column in LIBRARIES]
    assert {cell for cell in CELLS.values()} == {"yes", "empty", "no"}


@pytest.mark.parametrize(("saved", "library", "change"), FEW + REST)
def test_what_was_saved_goes_on(saved, library, change, tmp_path):
    old, new = CHANGES[change](SAVED[saved])
    state = jax.tree.map(lambda x: x + 1 if x.dtype != bool else x, old.init(PARAMS))
    restored = LIBRARIES[library](state, old.init(PARAMS), tmp_path)
    got = oc.carry_over(restored, new.init(PARAMS))
    expected = oc.carry_over(state, new.init(PARAMS))
    assert helpers.bits(got) == helpers.bits(expected)
    assert helpers.bits(oc.carry_over(got, old.init(PARAMS))) == helpers.bits(
        oc.carry_over(expected, old.init(PARAMS))
    )


@pytest.mark.parametrize("library", ["Orbax", "older Orbax"])
def test_orbax_saves_no_empty_state(library, tmp_path):
    assert CELLS["clip alone", library] == "empty"
    state = optax.clip(1.0).init(PARAMS)
    with pytest.raises(ValueError, match="Found empty item"):
        LIBRARIES[library](state, state, tmp_path)


def test_flax_saves_no_named_chain(tmp_path):
    assert CELLS["named_chain", "Flax"] == "no"
    state = SAVED["named_chain"](optax).init(PARAMS)
    with pytest.raises(TypeError, match="can not serialize"):
        by_flax(state, state, tmp_path)
