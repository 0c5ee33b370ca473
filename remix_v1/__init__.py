"""The messages and the stub of `proto/remix/v1/remix.proto`; the rest of it `make proto` makes."""
