//! What an operator sees when a configuration is wrong.
