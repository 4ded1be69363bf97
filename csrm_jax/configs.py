"""The run configs, as csrm_jax.configs.rm and so on.

They stand in configs/ at the top of the repository, where people edit them; a wheel has that folder
in place of this file.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[1] / 'configs')]
