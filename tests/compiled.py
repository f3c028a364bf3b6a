"""Programs that are read, not run."""

from nonlocal_jax.compiler.programs import Program


def program(lowered):
    """Returns what XLA makes of a lowered function, up to the machine code.

    That is made without its optimisations, which take a third of the time.
    """
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return Program(compiled.as_text())
