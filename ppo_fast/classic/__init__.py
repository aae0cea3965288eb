"""The interfaces of the original project around its trainer, kept word for word."""
