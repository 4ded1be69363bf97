"""Trees, masks, meshes, checkpoints and logs; knows nothing of safety."""
