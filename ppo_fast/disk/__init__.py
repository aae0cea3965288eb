"""Files and folders that are whole or not there, and locks of folders."""
