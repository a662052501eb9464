"""The outside: HTTP, Ray Serve and the command line. The only package that faces a client or a terminal."""
