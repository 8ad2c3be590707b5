"""Everything that knows 3D or diffusion."""
