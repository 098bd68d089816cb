/* status.c - names of statuses, and how a failure is put into words. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

const char *
krul_status_name(krul_status status)
{
    switch (status) {
        case KRUL_STATUS_OK:
            return "OK";
        case KRUL_STATUS_NO_MEMORY:
            return "NO_MEMORY";
        case KRUL_STATUS_BAD_SHAPE:
            return "BAD_SHAPE";
        case KRUL_STATUS_BAD_DTYPE:
            return "BAD_DTYPE";
        case KRUL_STATUS_BAD_VALUE:
            return "BAD_VALUE";
        case KRUL_STATUS_BAD_FORMAT:
            return "BAD_FORMAT";
        case KRUL_STATUS_CORRUPT:
            return "CORRUPT";
        case KRUL_STATUS_IO:
            return "IO";
        case KRUL_STATUS_STORE_FULL:
            return "STORE_FULL";
        case KRUL_STATUS_DEVICE:
            return "DEVICE";
        case KRUL_STATUS_UNSUPPORTED:
            return "UNSUPPORTED";
        case KRUL_STATUS_CANCELLED:
            return "CANCELLED";
        default:
            return "UNKNOWN";
    }
}

krul_status
krul_fail(krul_error *err, krul_status status, const char *format, ...)
{
    if (err != NULL) {
        va_list arguments;
        va_start(arguments, format);
        err->status = status;
        err->code = 0;
        vsnprintf(err->message, sizeof err->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

krul_status
krul_fail_errno(krul_error *err, int errno_value, const char *format, ...)
{
    bool is_full = errno_value == ENOSPC || errno_value == EDQUOT || errno_value == EFBIG;
    krul_status status = is_full ? KRUL_STATUS_STORE_FULL : KRUL_STATUS_IO;
    if (err != NULL) {
        va_list arguments;
        va_start(arguments, format);
        err->status = status;
        err->code = errno_value;
        vsnprintf(err->message, sizeof err->message, format, arguments);
        va_end(arguments);
        size_t used = strlen(err->message);
        char words[128] = "";
        /* The XSI form fills `words`; strerror itself is not safe from several threads. */
        if (strerror_r(errno_value, words, sizeof words) != 0) {
            snprintf(words, sizeof words, "errno %d", errno_value);
        }
        snprintf(err->message + used, sizeof err->message - used, ": %s", words);
    }
    return status;
}
