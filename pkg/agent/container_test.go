package agent

import (
	"context"
	"errors"
	"testing"
)

// Who has given up on a pause may have told others that the container runs.
func TestPauseGivenUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := new(container).pause(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("pause: %v", err)
	}
}
