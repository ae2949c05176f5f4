"""What the command line ends with in one line: the errors of bad input, of all modules."""

from configs.checks import ConfigError

from dssn_jax.distributed import PreemptedError
from dssn_jax.evaluation.predict import UnreadableError
from dssn_jax.prepare.prepare import DefectsError
from dssn_jax.training.loop import DivergedError
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.checkpoint import CheckpointError
from dssn_jax.workdir.restore import WorkdirError
from input_pipeline.errors import DataError

ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    DefectsError,
    DivergedError,
    OSError,  # A full disk, a folder that may not be written: the message has the path.
    PreemptedError,
    StateDictError,
    UnreadableError,
    WorkdirError,
)
