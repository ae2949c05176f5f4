"""What the command line ends with in one line: the errors of bad input, of all modules."""

from dssn_jax.checkpoint import CheckpointError
from dssn_jax.config import ConfigError
from dssn_jax.distributed import PreemptedError
from dssn_jax.own_images import DefectsError
from dssn_jax.predict import UnreadableError
from dssn_jax.saved_run import WorkdirError
from dssn_jax.state_dict_files import StateDictError
from dssn_jax.train import DivergedError
from input_pipeline import DataError

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
