"""What a connection can be: its states, one table of how they follow each other, and what is known of one."""

# Events
ACCEPTED, BYTES, REQUEST, BODY_AHEAD, CONTINUE, SENT, LAST, END, ENDED = (
    "accepted", "bytes", "request", "body ahead", "continue", "sent", "last", "end", "ended")


class State(dict):
    """A state is its row of the table below: event -> next state. A KeyError here is our bug, never the peer's."""

    def __init__(self, name):
        self.name = name

    __eq__ = object.__eq__
    __hash__ = object.__hash__      # type: ignore[assignment]  # a dict has none

    def __repr__(self):
        return self.name


FREE, IDLE, HEAD, BODY, INTERIM, RESPONSE, LINGER, CLOSING = map(
    State, ("free", "idle", "head", "body", "interim", "response", "linger", "closing"))

# The connection's life, all of it.
FREE.update({ACCEPTED: IDLE})
IDLE.update({BYTES: HEAD, REQUEST: RESPONSE, END: CLOSING})                           # nothing of a request has come
HEAD.update({REQUEST: RESPONSE, BODY_AHEAD: BODY, CONTINUE: INTERIM, END: CLOSING})   # a part of a request head has
BODY.update({REQUEST: RESPONSE, END: CLOSING})                                        # reading past a request body
INTERIM.update({SENT: BODY, END: CLOSING})                                            # sending 100 (Continue)
RESPONSE.update({SENT: IDLE, LAST: LINGER, END: CLOSING})                             # sending a response
LINGER.update({END: CLOSING})                                                         # reading past what is still sent
CLOSING.update({ENDED: FREE})                                                         # operations in flight are ending


class Connection:
    """What is known of one slot."""

    __slots__ = ("slot", "generation", "state", "since", "plan", "sent", "pending", "scanned", "attention",
                 "receiving", "sending", "shutting", "at_end", "unread", "request", "body")

    def __init__(self, slot):
        self.slot = slot
        self.generation = 0
        self.state = FREE
        self.since = 0              # when the present wait began, in ticks (seconds)
        self.plan = None            # what is being sent, or was last
        self.sent = 0               # bytes of `plan` sent
        self.pending = b""          # received, not yet taken
        self.scanned = 0            # how much of `pending` was searched for the end of a head
        self.attention = False      # whether there is more to do after a send than to wait for the next request
        self.receiving = False      # whether a receive is in flight
        self.sending = False        # in CLOSING: whether a send is in flight (else the state tells)
        self.shutting = False       # whether a shutdown is in flight
        self.at_end = False         # the client has sent all it will
        self.unread = False         # the client may still be sending what nobody will read
        self.request = None         # the request whose body is being read past
        self.body = None

    def forget(self):
        """Drop what a former connection left, before the slot's next one."""
        self.plan = self.request = self.body = None
        self.pending = b""
        self.sent = self.scanned = 0
        self.attention = self.at_end = self.unread = False


class Limits:
    """Times in seconds and counts, as the command line gives them."""

    def __init__(self, max_connections=4096, header_timeout=10, keepalive_timeout=60, min_rate=1024, drain=10):
        self.max_connections = max_connections
        self.header_timeout = header_timeout        # a request, body included, must have come by then
        self.keepalive_timeout = keepalive_timeout  # between requests
        self.min_rate = min_rate                    # bytes a second below which a reader is cut off
        self.drain = drain                          # what is in flight at the end may take this long
