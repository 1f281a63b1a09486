"""Networks and weights of other libraries."""
