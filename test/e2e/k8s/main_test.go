//go:build e2e

// Package k8s tests what pods do in Kubernetes, through the API and kubectl, as whoever has a kubeconfig sees it: KUBECONFIG names
// it, E2E_RUNTIME_CLASS the RuntimeClass of the pods (microvm; none for the cluster's default runtime, which checks the tests
// themselves). kubectl must be in the PATH, and the images of hack/images under their names on the node. hack/k8s-e2e.sh has a
// cluster for it.
package k8s

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"sigs.k8s.io/e2e-framework/klient"
	"sigs.k8s.io/e2e-framework/pkg/env"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

var (
	environment = env.NewWithConfig(envconf.NewWithKubeConfig(os.Getenv("KUBECONFIG")))
	client      klient.Client
	// runtimeClass is put into every pod; "" leaves the cluster's default.
	runtimeClass = "microvm"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run()) // names only, which takes no cluster
	}
	switch c := os.Getenv("E2E_RUNTIME_CLASS"); c {
	case "":
	case "none":
		runtimeClass = ""
	default:
		runtimeClass = c
	}
	environment.Setup(func(ctx context.Context, cfg *envconf.Config) (context.Context, error) {
		var err error
		if client, err = cfg.NewClient(); err != nil {
			return ctx, fmt.Errorf("connect by KUBECONFIG: %w", err)
		}
		return ctx, nil
	})
	os.Exit(environment.Run(m))
}

// slow is how many times slower than on an ordinary machine things may be: for limits that end a hang, never for measurements.
func slow() time.Duration {
	if n, err := strconv.Atoi(os.Getenv("E2E_SLOW")); err == nil && n > 0 {
		return time.Duration(n)
	}
	return 1
}

// patience bounds every wait: what exceeds it hangs.
func patience() time.Duration { return 30*time.Second + 30*time.Second*slow() }
