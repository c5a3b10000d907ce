"""The gateway: a web page and HTTP interfaces in front of Hunyuan3D-2 servers. Importing it needs nothing and does nothing."""
