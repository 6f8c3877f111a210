# Writes a source file that holds the status page, when the page is newer.
file(READ "${PAGE}" STATUS_PAGE)
configure_file("${TEMPLATE}" "${OUTPUT}" @ONLY)
