package virtiotest

// Script is a fuzzer's input, read as the steps of a test.
type Script []byte

// Byte takes the next one. Behind the end there are zeroes.
func (s *Script) Byte() byte {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return b
}

// Bytes takes the next n, or as many as there are.
func (s *Script) Bytes(n int) []byte {
	n = min(n, len(*s))
	b := (*s)[:n]
	*s = (*s)[n:]
	return b
}
