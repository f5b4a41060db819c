"""OpenSSL's libraries, for Python: the functions and numbers that are used, how they are called, what went wrong.

Signatures and numbers are those of <openssl/ssl.h>, <openssl/bio.h>, <openssl/x509.h>, <openssl/err.h>, unchanged
from OpenSSL 3.0 to 3.5. The library is loaded when TLS is asked for, and not before.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char, c_char_p, c_int, c_long, c_ubyte, c_uint, c_uint16, c_ulong, c_void_p

from options import StartError

TLS1_2, TLS1_3 = 0x0303, 0x0304                 # <openssl/ssl.h>

ServernameCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_int), c_void_p)
AlpnCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_void_p), POINTER(c_ubyte), c_void_p, c_uint, c_void_p)
KeylogCallback = CFUNCTYPE(None, c_void_p, c_void_p)
PasswordCallback = CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_void_p)

TYPES = {"P": c_void_p, "s": c_char_p, "c": c_char, "i": c_int, "I": c_uint, "l": c_long, "L": c_ulong, "H": c_uint16,
         "-": None}                                     # size_t and uint64_t are unsigned long
FUNCTIONS = {   # name: the types of its result and its arguments
    "ASN1_STRING_get0_data": "PP", "ASN1_STRING_length": "iP", "BIO_ctrl": "lPilP", "BIO_ctrl_pending": "LP",
    "BIO_free": "iP", "BIO_new": "PP", "BIO_new_mem_buf": "PPi", "BIO_s_mem": "P", "BIO_up_ref": "iP",
    "ERR_clear_error": "-", "ERR_get_error": "L", "ERR_reason_error_string": "sL", "EVP_PKEY_free": "-P",
    "EVP_PKEY_get0_type_name": "sP", "EVP_PKEY_get_base_id": "iP", "EVP_PKEY_get_group_name": "iPPLP",
    "EVP_sha256": "P", "EVP_sha384": "P", "GENERAL_NAME_get0_value": "PPP", "GENERAL_NAMES_free": "-P",
    "HMAC": "PPPiPLPP", "OPENSSL_hexstr2buf_ex": "iPLPPc", "OPENSSL_sk_num": "iP", "OPENSSL_sk_value": "PPi",
    "OpenSSL_version": "si", "PEM_read_bio_PrivateKey": "PPPPP", "PEM_read_bio_X509": "PPPPP", "RAND_priv_bytes": "iPi",
    "SSL_CIPHER_get_protocol_id": "HP", "SSL_CTX_callback_ctrl": "lPiP", "SSL_CTX_check_private_key": "iP",
    "SSL_CTX_ctrl": "lPilP", "SSL_CTX_free": "-P", "SSL_CTX_new": "PP", "SSL_CTX_set_alpn_select_cb": "-PPP",
    "SSL_CTX_set_cipher_list": "iPs", "SSL_CTX_set_keylog_callback": "-PP", "SSL_CTX_set_num_tickets": "iPL",
    "SSL_CTX_set_options": "LPL", "SSL_CTX_set_session_id_context": "iPsI", "SSL_CTX_use_certificate": "iPP",
    "SSL_CTX_use_PrivateKey": "iPP", "SSL_do_handshake": "iP", "SSL_free": "-P", "SSL_get_client_random": "LPPL",
    "SSL_get_current_cipher": "PP", "SSL_get_error": "iPi", "SSL_get_server_random": "LPPL",
    "SSL_get_servername": "sPi", "SSL_get_session": "PP", "SSL_new": "PP", "SSL_SESSION_get_master_key": "LPPL",
    "SSL_select_next_proto": "iPPPIPI", "SSL_session_reused": "iP", "SSL_set_accept_state": "-P", "SSL_set_bio": "-PPP",
    "SSL_set_SSL_CTX": "PPP", "SSL_shutdown": "iP", "SSL_version": "iP", "TLS_server_method": "P",
    "X509_cmp_current_time": "iP", "X509_check_issued": "iPP", "X509_check_private_key": "iPP", "X509_free": "-P",
    "X509_get0_notAfter": "PP", "X509_get0_notBefore": "PP", "X509_get_ext_d2i": "PPiPP",
}
# Called for every request: they take c_void_p objects and ints that fit a C int, and ctypes needs a quarter less time
# for these without being told what to expect.
HOT = "BIO_read", "BIO_write", "SSL_read", "SSL_write"


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
    TLSEXT_OK, TLSEXT_ALERT_FATAL, TLSEXT_NOACK, NPN_NEGOTIATED = 0, 2, 3, 1
    # <openssl/bio.h>, <openssl/x509v3.h>, <openssl/obj_mac.h>
    BIO_CTRL_RESET = 1
    GEN_DNS, NID_SUBJECT_ALT_NAME, X509_V_OK = 2, 85, 0

    def __init__(self):
        try:
            # It brings libcrypto. PyDLL keeps the interpreter lock: there is one thread, and nobody to hand it to.
            library = ctypes.PyDLL("libssl.so.3")
        except OSError as error:
            name = "libcrypto.so.3" if "libcrypto" in str(error) else "libssl.so.3"
            raise OpenSSLError(f"TLS needs OpenSSL 3, and {name} is not there: install it "
                               "(Debian: apt install libssl3, or libssl3t64)") from None
        for name, types in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, *function.argtypes = (TYPES[letter] for letter in types)
            setattr(self, name, function)
        for name in HOT:
            setattr(self, name, getattr(library, name))
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
        """Write the HMAC (RFC 2104) of `size` bytes of `data`, by the hash function `digest` ("EVP_sha256"), to `out`.
        All are addresses or memory of ctypes', data may be bytes too; out may be the key or the data."""
        self.check(self.HMAC(getattr(self, digest)(), key, key_size, data, size, out, None), "HMAC")


def wipe(memory):
    """Overwrite a bytearray (or other writable memory) with zeros, in place."""
    ctypes.memset(ctypes.byref(ctypes.c_char.from_buffer(memory)), 0, len(memory))
