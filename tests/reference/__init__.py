"""An independent, slow implementation of the method, against which the product's numbers are checked."""
