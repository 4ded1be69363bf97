"""The server: rule sets by name, requests in the forms that clients know, one device loop."""
