"""What other libraries take from this one, or give it; each is an extra, loaded when it is asked for."""
