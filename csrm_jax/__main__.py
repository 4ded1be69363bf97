"""python -m csrm_jax: the same as the command csrm_jax."""

from csrm_jax.main import main

main()
