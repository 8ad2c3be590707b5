"""What is optimised and how it is rendered: fields, materials, cameras, renderers."""
