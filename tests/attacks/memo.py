"""Keeps what is traced for a network in this process: tracing takes most of the time of an attack that is accepted.

The learner, its abstract state, its step and the programs of an evaluator are those of an earlier command whose
configuration differs in names and places alone.
"""

import dataclasses
import json

import jax

from dssn_jax.evaluation.evaluate import Evaluator
from dssn_jax.learner import learner
from dssn_jax.learner.learner import Learner

# Keys that no program depends on.
_PLACES = (
    "name", "data.root", "data.splits", "data.split", "data.folders", "data.label_map", "data.tfds", "model.pretrained",
)  # fmt: skip
_JITTED = type(jax.jit(lambda: None))
_kept: dict[tuple, object] = {}


def install() -> None:
    """Makes this process remember."""
    build, abstract_state, make_train_step = learner.build, Learner.abstract_state, Learner.make_train_step
    init = Evaluator.__init__

    def remembered_build(config, mesh=None, *options, **named):
        key = ("build", _key(config), str(mesh), str(options), str(named))
        return dataclasses.replace(_remember(key, lambda: build(config, mesh, *options, **named)), config=config)

    def remembered_init(self, of: Learner, *options, **named):
        init(self, of, *options, **named)
        programs = {name: value for name, value in vars(self).items() if isinstance(value, _JITTED)}
        vars(self).update(_remember(_name("evaluator", of), lambda: programs))

    learner.build = remembered_build
    Evaluator.__init__ = remembered_init
    Learner.abstract_state = lambda self: _remember(_name("state", self), lambda: abstract_state(self))
    Learner.make_train_step = lambda self: _remember(_name("step", self), lambda: make_train_step(self))


def _remember(key: tuple, make):
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def _name(what: str, of: Learner) -> tuple:
    return what, _key(of.config), str(of.mesh), id(of.optimizer.schedule)


def _key(config) -> str:
    """Returns a configuration without places, as text."""
    values = json.loads(config.to_json())
    for path in _PLACES:
        *section, name = path.split(".")
        (values[section[0]] if section else values).pop(name, None)
    return json.dumps(values, sort_keys=True)
