"""The run configs, one file a job, and what they share; installed as csrm_jax.configs."""
