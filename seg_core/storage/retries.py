"""How often a store that does not answer is asked again, and how long it is waited for: the whole policy.

| who asks | what is asked again | how often |
| --- | --- | --- |
| boto3: listings, small files, writes | a request that is throttled or not answered | ATTEMPTS, for two minutes |
| boto3: a file that arrives damaged or incomplete | the whole file | after each of DAMAGE_PAUSES |
| Arrow: tables, pieces of files | a request that is throttled or not answered | ATTEMPTS |
| GDAL: windows of imagery | a request that is throttled or not answered | GDAL_ATTEMPTS, for half a minute |
| `imagery.raster`: a chip that GDAL has given up | the chip, past GDAL's cache | after each of CHIP_PAUSES |

What is refused (access, no such bucket) is never asked again. Disks are asked once.
"""

import random

THROTTLED = (429, 500, 502, 503, 504)  # answers of HTTP that are worth another attempt
THROTTLED_CODES = {  # likewise, whatever the status
    *("RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"),
    *("SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled"),
    *("RequestThrottledException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequestsException"),
}
ATTEMPTS = 16  # of a request, at growing random intervals
LONGEST_PAUSE = 20.0  # s
REPORTED_ATTEMPT = 4  # attempts, after a few seconds, of which a message says so
GDAL_ATTEMPTS = 6
GDAL_PAUSE = 0.5  # s before GDAL's second attempt, doubled before each further one
DAMAGE_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # s
CHIP_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # s
CONNECT_TIMEOUT = 10  # s; and without a byte before GDAL gives a request up
READ_TIMEOUT = 60  # s without an answer before boto3 gives a request up


def pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt, counted from 1. All those of a request make about two minutes."""
    return float(min(0.1 * 2**attempt, LONGEST_PAUSE)) * random.uniform(0.5, 1.0)
