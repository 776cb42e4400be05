"""Functions by the names and signatures of other packages."""
