"""Visual forward-forward networks in JAX: convolutional networks trained without back-propagation across groups of layers."""
