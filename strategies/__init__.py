"""How updates become the next adapter: pure array functions, one file per paper."""
