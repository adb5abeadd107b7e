"""The controller's face: REST, watch stream, dashboard, and the command line. Records what is asked; decides nothing."""
