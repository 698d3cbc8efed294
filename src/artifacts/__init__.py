"""Files: their names (paths), reading and writing them (io), results and their settings (store), and locks."""
