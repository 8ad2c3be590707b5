"""What pulls images towards a prompt: priors and the losses distilled from them."""
