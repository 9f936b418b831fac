"""The command line of coreinfer_sim; installed as coreinfer_sim_cli."""
