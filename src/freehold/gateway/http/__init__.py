"""HTTP/1.1 and server-sent events as bytes: the server, the client, nothing about models."""
