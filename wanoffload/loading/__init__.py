"""From a checkpoint to a streamed model: what files hold, what a class needs, and the reading."""
