"""Where and how a run is carried out: meshes, processes, and the folder that keeps it."""
