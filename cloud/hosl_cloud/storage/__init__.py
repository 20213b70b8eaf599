"""What the service keeps: its database and its data folder."""
