package main

import (
	"os/exec"
	"strings"
	"testing"
)

// There is one of these processes for each sandbox: what a package brings along
// is paid for by all of them.
func TestLinksNoHTTP(t *testing.T) {
	out, err := exec.Command("go", "list", "-tags", "no_grpc", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range strings.Fields(string(out)) {
		switch pkg {
		case "google.golang.org/grpc", "golang.org/x/net/http2", "net/http", "crypto/tls", "text/template":
			t.Errorf("the shim links %s; go list -deps says through what", pkg)
		}
	}
}
