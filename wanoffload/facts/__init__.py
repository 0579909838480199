"""What is known of a model before it is loaded. Only `modules` needs torch."""
