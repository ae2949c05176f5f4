"""JAX's compilation cache: keeps compiled programs in a folder, and counts what is compiled and what is loaded."""

import pathlib

import jax

_PROGRAM = "/jax/core/compile/backend_compile_duration"  # Events that JAX reports: a program, compiled or loaded, ...
_LOADED = "/jax/compilation_cache/cache_hits"  # ... and a program loaded from the cache.


def keep_programs(folder: pathlib.Path) -> None:
    """Makes JAX keep compiled programs in `folder`, unless it is configured to keep them elsewhere."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Compilations:
    """Counts the programs of this process that are compiled or loaded, and the seconds that both take."""

    def __init__(self):
        self._programs, self._loaded, self._seconds = 0, 0, 0.0
        jax.monitoring.register_event_listener(self._count)
        jax.monitoring.register_event_duration_secs_listener(self._time)

    def take(self) -> dict[str, float]:
        """Returns {"compiled", "loaded", "compile_seconds"} since the last call."""
        counts = {"compiled": self._programs - self._loaded, "loaded": self._loaded, "compile_seconds": self._seconds}
        self._programs, self._loaded, self._seconds = 0, 0, 0.0
        return counts

    def _count(self, event: str, **_) -> None:
        self._loaded += event == _LOADED

    def _time(self, event: str, seconds: float, **_) -> None:
        if event == _PROGRAM:
            self._programs += 1
            self._seconds += seconds
