"""Models as they lie in folders, hubs and files: opened, with what belongs to them. Only here files are downloaded."""
