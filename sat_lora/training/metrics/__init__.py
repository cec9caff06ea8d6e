"""What a validation measures beside the loss: a module per metric, and the dictionary that names them."""
