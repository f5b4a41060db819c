"""OpenSSL's libraries, for Python: the functions and numbers that are used, how they are called, what went wrong.

Signatures and numbers are those of <openssl/ssl.h>, <openssl/bio.h>, <openssl/x509.h>, <openssl/err.h>, unchanged
from OpenSSL 3.0 to 3.5. The library is loaded when TLS is asked for, and not before.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint16, c_uint64, c_void_p

from options import StartError

TLS1_2, TLS1_3 = 0x0303, 0x0304                 # <openssl/ssl.h>

ServernameCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_int), c_void_p)
AlpnCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_void_p), POINTER(c_ubyte), c_void_p, c_uint, c_void_p)
KeylogCallback = CFUNCTYPE(None, c_void_p, c_void_p)
PasswordCallback = CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_void_p)

P = c_void_p
# function -> (result, arguments); None for those that are called for every request: they take c_void_p objects and ints
# that fit a C int, and ctypes needs a quarter less time for these without being told what to expect
FUNCTIONS: dict[str, tuple | None] = {
    "BIO_read": None, "BIO_write": None, "SSL_read": None, "SSL_write": None,
    "BIO_ctrl": (ctypes.c_long, P, c_int, ctypes.c_long, P), "BIO_ctrl_pending": (c_size_t, P),
    "BIO_free": (c_int, P), "BIO_new": (P, P), "BIO_new_mem_buf": (P, P, c_int), "BIO_s_mem": (P,),
    "BIO_up_ref": (c_int, P),
    "ERR_clear_error": (None,), "ERR_get_error": (ctypes.c_ulong,),
    "ERR_reason_error_string": (c_char_p, ctypes.c_ulong),
    "EVP_PKEY_free": (None, P), "EVP_PKEY_get_base_id": (c_int, P), "EVP_sha256": (P,), "EVP_sha384": (P,),
    "GENERAL_NAMES_free": (None, P), "GENERAL_NAME_get0_value": (P, P, POINTER(c_int)),
    "ASN1_STRING_get0_data": (P, P), "ASN1_STRING_length": (c_int, P),
    "HMAC": (P, P, P, c_int, P, c_size_t, P, P),
    "OPENSSL_hexstr2buf_ex": (c_int, P, c_size_t, P, P, ctypes.c_char),
    "OPENSSL_sk_num": (c_int, P), "OPENSSL_sk_value": (P, P, c_int), "OpenSSL_version": (c_char_p, c_int),
    "PEM_read_bio_PrivateKey": (P, P, P, PasswordCallback, P), "PEM_read_bio_X509": (P, P, P, P, P),
    "X509_cmp_current_time": (c_int, P), "X509_free": (None, P), "X509_get0_notAfter": (P, P),
    "RAND_priv_bytes": (c_int, P, c_int),
    "X509_get0_notBefore": (P, P), "X509_get_ext_d2i": (P, P, c_int, P, P),
    "SSL_CIPHER_get_protocol_id": (c_uint16, P), "SSL_CTX_callback_ctrl": (ctypes.c_long, P, c_int, ServernameCallback),
    "SSL_CTX_check_private_key": (c_int, P), "SSL_CTX_ctrl": (ctypes.c_long, P, c_int, ctypes.c_long, P),
    "SSL_CTX_free": (None, P), "SSL_CTX_new": (P, P), "SSL_CTX_set_alpn_select_cb": (None, P, AlpnCallback, P),
    "SSL_CTX_set_cipher_list": (c_int, P, c_char_p), "SSL_CTX_set_keylog_callback": (None, P, KeylogCallback),
    "SSL_CTX_set_num_tickets": (c_int, P, c_size_t), "SSL_CTX_set_options": (c_uint64, P, c_uint64),
    "SSL_CTX_set_session_id_context": (c_int, P, c_char_p, c_uint),
    "SSL_CTX_use_PrivateKey": (c_int, P, P), "SSL_CTX_use_certificate": (c_int, P, P),
    "SSL_SESSION_get_master_key": (c_size_t, P, P, c_size_t), "SSL_do_handshake": (c_int, P), "SSL_free": (None, P),
    "SSL_get_client_random": (c_size_t, P, P, c_size_t), "SSL_get_current_cipher": (P, P),
    "SSL_get_error": (c_int, P, c_int),
    "SSL_get_server_random": (c_size_t, P, P, c_size_t), "SSL_get_servername": (c_char_p, P, c_int),
    "SSL_get_session": (P, P), "SSL_new": (P, P), "SSL_session_reused": (c_int, P),
    "SSL_set_SSL_CTX": (P, P, P), "SSL_set_accept_state": (None, P), "SSL_set_bio": (None, P, P, P),
    "SSL_shutdown": (c_int, P), "SSL_version": (c_int, P), "TLS_server_method": (P,),
}


class OpenSSLError(StartError):
    """OpenSSL is not to be had, or will not do something; the text says what and why."""


class OpenSSL:
    """The functions above, as attributes. `version`: "OpenSSL 3.0.19". Raises OpenSSLError."""

    # <openssl/ssl.h>
    CTRL_MODE, CTRL_SESS_CACHE_MODE, CTRL_SERVERNAME_CALLBACK = 33, 44, 53
    CTRL_TICKET_KEYS, CTRL_CHAIN_CERT, CTRL_GROUPS_LIST, CTRL_MIN_PROTO_VERSION = 59, 89, 92, 123
    MODE_RELEASE_BUFFERS, SESS_CACHE_OFF = 0x10, 0
    OP_NO_COMPRESSION, OP_NO_RENEGOTIATION = 1 << 17, 1 << 30
    ERROR_WANT_READ, ERROR_ZERO_RETURN = 2, 6
    TLSEXT_OK, TLSEXT_ALERT_FATAL, TLSEXT_NOACK = 0, 2, 3
    # <openssl/bio.h>, <openssl/x509v3.h>, <openssl/obj_mac.h>
    BIO_CTRL_RESET = 1
    GEN_DNS, NID_SUBJECT_ALT_NAME = 2, 85

    def __init__(self):
        try:
            # It brings libcrypto. PyDLL keeps the interpreter lock: there is one thread, and nobody to hand it to.
            library = ctypes.PyDLL("libssl.so.3")
        except OSError as error:
            name = "libcrypto.so.3" if "libcrypto" in str(error) else "libssl.so.3"
            raise OpenSSLError(f"TLS needs OpenSSL 3, and {name} is not there: install it "
                               "(Debian: apt install libssl3, or libssl3t64)") from None
        for name, prototype in FUNCTIONS.items():
            function = getattr(library, name)
            if prototype:
                function.restype, *function.argtypes = prototype
            setattr(self, name, function)
        self.version = " ".join(self.OpenSSL_version(0).decode().split()[:2])

    def __getattr__(self, name):        # reached only for what is not there; lets type checkers know that more may be
        raise AttributeError(name)

    def reason(self):
        """What the oldest error in OpenSSL's queue says, in words; the queue is empty after that."""
        code = self.ERR_get_error()
        words = self.ERR_reason_error_string(code) if code else None
        self.ERR_clear_error()
        return words.decode(errors="replace") if words else f"error {code:#x}" if code else "no reason given"

    def check(self, result, what):
        """`result`, or OpenSSLError where it is 0 or less, or NULL."""
        if result is None or result <= 0:
            raise OpenSSLError(f"{what}: {self.reason()}")
        return result

    def hmac(self, digest, key, key_size, data, size, out):
        """HMAC (RFC 2104) of `size` bytes of `data` with the hash function `digest` ("EVP_sha256"), written to `out`.

        Key, data and out are addresses or memory of ctypes'; out may be one of the others. data may be bytes.
        """
        self.check(self.HMAC(getattr(self, digest)(), key, key_size, data, size, out, None), "HMAC")


def wipe(memory):
    """Overwrite a bytearray (or other writable memory) with zeros, in place."""
    ctypes.memset(ctypes.byref(ctypes.c_char.from_buffer(memory)), 0, len(memory))
