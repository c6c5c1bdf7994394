"""The yardstick: what "the same numbers" means, and the certificate that says so."""
