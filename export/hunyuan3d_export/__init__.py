"""Hunyuan3D-2's shape denoiser on its way from weights to a Triton model repository: one file per arrow."""
