"""What of vLLM's trainer side the follower's sender uses, written by hand: no group, no GPU; instead of tensors it
tells the server their sum. It is on the path of senders only.
"""
