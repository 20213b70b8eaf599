"""The way to the cloud: whom to trust, what to fetch, the websocket."""
