"""What is learnt from the iterations before, to need fewer of them."""
